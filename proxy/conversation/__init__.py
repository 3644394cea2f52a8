"""The conversation core: identity, the epoch window, the fault loop and the stream sieve. Pure.

Nothing here reads a clock, a random number, a file or a socket; what it needs is handed in, so
every part can be tested as a dialogue, without mocks.
"""
