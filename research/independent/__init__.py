"""What servers that step on their own cost each other, by the demo model.

Sections on this machine, over loopback:
    processor  processor time of the servers without users over that of the one that serves a stream
               (examples/hosts.txt, policy `dance`), front ends included
    stopped    a server stands still for 8 s (SIGSTOP), all of whose experts others hold as well:
               longest gap of the others' streams, which begin anew as long as it lasts
    killed     an engine is killed: the same until all servers answer again

Sections on a testbed (root, Linux):
    beside     p99 gap between tokens of a stream while another host computes prompts of 1,500
               tokens, over that of the same stream in quiet
    many       mean latency of 12 hosts over that of 3 of them, each with 1/6 of a core (of two),
               as many slots and the same load
    bytes      sent through the hosts' interfaces over the bound: hidden states that were sent,
               there and back; of prompts of 64 tokens and more, and of the example prompts with
               their answers

In `stopped` and `killed` all answers are compared with those of a quiet run.

Modules: `streams` asks, `loopback` and `hosts` have the sections.
"""
