"""Measure what servers that step independently cost each other, on the demo model.

Sections on this machine, over loopback:
    processor  processor time of the servers without users, over that of the server with a stream
               (examples/hosts.txt, policy `dance`), front ends included
    stopped    a server is stopped for 8 s (SIGSTOP), all of whose experts have replicas on other
               servers: longest gap in the other servers' streams, which are repeated meanwhile
    killed     an engine is killed: the same, until all servers answer again

Sections on a testbed (needs root on Linux):
    beside     p99 gap between tokens of a stream while another host computes prompts of 1,500
               tokens, over the p99 gap of the same stream on idle hosts
    many       mean latency of 12 hosts over that of 3 of these hosts, each with 1/6 of a core (of
               two cores), the same number of slots and the same load
    bytes      bytes sent through the hosts' interfaces over the lower bound, which is the bytes of
               the transferred hidden states, there and back; for prompts of 64 tokens and more, and
               for the example prompts with their answers

In `stopped` and `killed`, all answers are compared with those of a quiet run.

Modules: `streams` sends requests, `loopback` and `hosts` have the sections.
"""
