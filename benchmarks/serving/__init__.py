"""A served cluster, measured over HTTP as its users see it.

    python benchmarks/serve.py                            # starts the demo on three servers
    python benchmarks/serve.py --rate 2 --duration 60 --output OUT.json --plot OUT.png
    python benchmarks/serve.py --trace azure_conv.csv --speedup 4 --requests 200
    python benchmarks/serve.py --url http://127.0.0.1:8000 --model DIR --tasks DIR
    python benchmarks/serve.py --check                    # all sections, exit code 1 if one misses

Requests arrive in an open loop: when they come does not depend on the answers. Times count from
the moment when a request was to arrive, so that a client or server that is late does not hide it.

Figures:
    TTFT   time to the first token
    TPOT   time per output token: from the first to the last, over the tokens between
    ITL    inter-token latency: from one piece of a stream to the next
    E2E    end to end: to the last token

Sections:
    idle    what servers that rest take of a core, and how soon requests begin there
    static  a batch at a time, as without continuous batching: the client lets the requests that
            have arrived wait until every answer of the batch before is finished, on all servers,
            and then starts as many as run at once. Its throughput when all requests wait; the
            highest Poisson rate that it sustains; the servers without that gate at the same rate
    long    four streams beside which a long prompt arrives, on each server in turn, with the other
            servers idle and with a stream on each
    prefix  a second prompt with the beginning of a first one
    soak    requests of mixed length at saturation; clients that hang up, and requests that are
            wrong, among them. All answers are compared with those of a quiet run

Modules: `http` and `client` talk to servers, `cluster` starts them, `memory` looks at their
processes; `texts`, `arrivals` and `workload` say what is asked and when, `drive` asks it, `figures`
and `agreement` judge answers; `setting` is what the sections `idle`, `static`, `long`,
`prefix` and `soak` (with `wrong`, its bad requests) work with; `tables`, `plots` and `report` show.
"""
