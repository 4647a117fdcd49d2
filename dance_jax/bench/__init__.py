"""Measure running servers over HTTP, as their users see them.

    dance-jax bench http://127.0.0.1:8000 http://127.0.0.1:8001 --rate 2 --duration 60
    dance-jax bench --hosts hosts.txt --requests 200       # starts the cluster, and stops it
    dance-jax bench http://127.0.0.1:8000 --model DIR --trace azure_conv.csv --speedup 4

Requests arrive in an open loop: arrival times do not depend on the answers. Times count from the
moment when a request was due to arrive, so that delays of the client or the server are included.

Figures, of each server and of all:
    TTFT   time to first token
    TPOT   time per output token: from the first to the last token, over the tokens between
    ITL    inter-token latency: from one piece of a stream to the next
    E2E    end to end: to the last token

Modules: `main` is the command. `load` carries out a run; benchmarks/serve.py uses it too.
`arguments` has the options of a run. `http` and `client` talk to servers, `cluster` starts them.
`texts`, `arrivals` and `workload` make the requests and their arrival times; `drive` sends the
requests. `figures` evaluates the answers; `tables` and `report` present the results. `terminal` has
what a command shows while it runs, and its exit codes.
"""
