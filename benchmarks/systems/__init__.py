"""Systems that serve one model on the hosts of a testbed, measured over HTTP on the same work.

Systems:
    latency, dance    this project with that policy, or any other policy of ours. Experts are placed
                      by what requests of the same users, asked before, have used
    old               another checkout of this project (--old DIR), policy `latency`
    star              llama.cpp: `ggml-rpc-server` in every host, each with a part of the layers,
                      and `llama-server -kvu` outside the hosts, which asks them all

All are up at once and take turns, in another order in each repetition; a ratio is the median over
repetitions of ours over the other's. Processor time is counted by system. Servers that rest do next
to nothing, but for those in lock step, which keep looking at each other: compare with the star in a
run without --old, or they take part of the hosts' cores from ours. Links get one rate after
another, and all is started anew for each, since placements depend on it.

A load is so many users at once, each with random tokens of the range of the vocabulary that its
host's users have for themselves, and greedy answers of fixed length. User n is on host n mod 3.

Figures:
    decode    tokens/s of a stream after its first token, median of the users
    total     output tokens/s of all users, from the start to the last token
    TTFT      time to the first token, median of the users
    CPU       processor time of all of the system's processes on all hosts (and of `llama-server`),
              over output tokens; the prompt's is in it
    kB        through the hosts' interfaces, sent and received, over output tokens; answers to users
              are in it

Modules: `running` starts systems, `loads` asks them, `results` judges and shows.
"""
