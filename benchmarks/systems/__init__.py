"""Compare systems that serve one model on the hosts of a testbed, over HTTP on the same requests.

Systems:
    latency, dance    this project with that policy (or any other policy of --policies). Experts are
                      placed by the activations of earlier requests of the same users
    old               another checkout of this project (--old DIR), with the policy `latency`
    star              llama.cpp: a `ggml-rpc-server` on every host, each with some of the layers,
                      and a `llama-server -kvu` outside the hosts, which calls all of them

All systems run at once and are measured in turn, in a different order in each repetition. A ratio
is the median over the repetitions of our figure over the other system's. Processor time is counted
by system. Idle servers use almost no processor time, except those of old versions in lock step,
which keep polling each other. Compare with the star in a run without --old; otherwise such servers
take cores from ours. The link rates are measured one after another. All systems restart for each
rate, because placements depend on the rate.

A load is a number of concurrent users. Each user sends random tokens from a range of the vocabulary
that only the users of the same host have, and gets a greedy answer of fixed length. User n is on
host n mod 3.

Figures:
    decode    tokens/s of a stream after its first token, median of the users
    total     output tokens/s of all users, from the start to the last token
    TTFT      time to first token, median of the users
    CPU       processor time of all the system's processes on all hosts (and of `llama-server`),
              prefill included, per output token
    kB        traffic through the hosts' interfaces, sent plus received, answers to users included,
              per output token

Modules: `running` starts the systems, `loads` sends requests, `results` has ratios, targets and
tables.
"""
