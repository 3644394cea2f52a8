"""The Chat Completions contract as a suite of checks that anyone can run against any proxy.

A check is an id, a one-line promise and a scenario over real HTTP: a scripted upstream behind the
gateway under test, a raw client (and the official one) in front of it. `bare` is the client straight
at the upstream: what every check takes for granted passes there by construction. Behind a slash stands
the protocol that the upstream speaks where that is not OpenAI's: the same scripts, put into its words.

    python -m tests.contract                                  # bare and llm-pager
    python -m tests.contract --gateways bare,llm-pager,litellm,headroom,virtual-context,ctxkeeper
    python -m tests.contract --gateways llm-pager/anthropic,llm-pager/gemini,litellm/anthropic,litellm/gemini
    python -m tests.contract --base-url http://127.0.0.1:9000/v1 --upstream-port 9100
    python -m tests.contract.gateways install                 # venvs for the other gateways

Nothing here imports `proxy`: a mistake in it cannot hide in its own measure.
"""
