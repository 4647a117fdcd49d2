"""Measure a served cluster over HTTP, as its users see it.

    python benchmarks/serve.py                            # starts the demo on three servers
    python benchmarks/serve.py --rate 2 --duration 60 --output OUT.json --plot OUT.png
    python benchmarks/serve.py --trace azure_conv.csv --speedup 4 --requests 200
    python benchmarks/serve.py --url http://127.0.0.1:8000 --model DIR --tasks DIR
    python benchmarks/serve.py --check                    # all sections; exit code 1 if one misses

A run under load, without sections, is that of `dance-jax bench`: `dance_jax.bench` defines its
figures and has the client, the arrivals and the start of a cluster.

Sections:
    idle    processor use of idle servers, and the time until they start a request
    static  one batch at a time, as without continuous batching: requests that have arrived wait in
            the client until every answer of the previous batch has finished, on all servers; then
            the client starts as many requests as run at once. Measured are the throughput of
            batches when all requests wait, the highest Poisson rate that batches sustain, and the
            same servers with continuous batching at that rate
    long    a long prompt that arrives beside four streams, on each server in turn, with the other
            servers idle and with one stream on each of them
    prefix  a second prompt that shares the beginning of a first one (prefix cache)
    soak    requests of mixed lengths at saturation, including clients that disconnect and invalid
            requests. All answers are compared with those of a quiet run

Modules: `task_files` reads the texts of requests; `gates` sends them in batches or with a bound;
`memory` samples the memory of the servers' processes; `agreement` compares answers. The sections
are `idle`, `static`, `long`, `prefix` and `soak` (whose invalid requests are in `wrong`); `setting`
has what they share. `tables`, `plots` and `report` present the results.
"""
