"""`llm-pager export | import | migrate`: what is stored, to and from files and other stores.

Promises: nothing is sent upstream; what was done can be done again (ids are made of contents, so the same is stored once);
what cannot be read is told and left out, and the rest goes on. Exit status 0; 1 where the machine or a store refuses; 2 for
arguments, or a file that is none of what can be read; 3 where something was left out.
"""
