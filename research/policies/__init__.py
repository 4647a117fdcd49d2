"""Metrics of the placements of every policy, on measured routes and counts.

    python research/placement.py                             # a synthetic trace, made here
    python research/placement.py --traces DIR --output OUT   # measured ones; tables, plots, JSON

All sections but `survive` take 6 to 13 minutes on two cores, most of that for `latency` on 8 and 16
servers; `survive` takes about 5 minutes of processor time.

Sections:
    reference  three servers with 1, 1 and 2 devices and 1.32 x the model of memory
    counts     the same servers, if only counts are known
    memory     the same servers with less and more memory
    servers    4, 8 and 16 servers
    survive    what it costs that every expert has holders for the loss of one or two servers
    churn      experts that move when a placement is made anew
    speed      times to solve

Every server has a workload of its own: topics of the trace. A policy sees the first half of each
topic's tokens (counts are normalised, so all servers weigh the same), and its placement is measured
on the second half. Counts alone have no halves: their placements are measured on the same counts.

Columns (means over servers; `dance_jax.placement.measures`):
    remote      share of expert calls that leave the server
    any miss    share of (token, layer) with any such call: a step of servers on their own waits for
                another server there
    transfers   remote servers that a token visits per layer
    busiest     hidden states into or out of the busiest server of a layer, per token of a server:
                worst server and direction of each layer, mean over layers
    load        largest share of a layer's expert calls on one device, mean over layers
    device      largest share of all layers' expert calls on one device
    layer time  predicted time of a layer if servers step on their own, per row of a step; the unit
                is a hidden state through a link, and servers are equal (`CallCost.reference`)
    local       share of the expert calls that the policy saw which are served at home
    bound       upper bound of `local` for any placement in the same slots, if the policy knows one
    ms          time to solve, in a second run, without compilation
    moved       experts that servers must load

Dim figures are those published with the trace, and the relative difference to them. Of equal
servers the published figures visit the one with the lowest number, and this engine the next in a
ring; the difference is computed with the published rule.

Modules: `traces` reads traces, `setups` combines servers, workloads and memory, `figures`, `churn`
and `speed` measure, `published` has the figures to compare with, `targets` judges, `tables` and
`plots` show.
"""
