"""What every placement policy costs, on measured routes and counts.

    python research/placement.py                             # a synthetic trace, made here
    python research/placement.py --traces DIR --output OUT   # measured ones; tables, plots, JSON

All of it takes 6 to 13 minutes on two cores, most of it `latency` on 8 and 16 servers.

Sections:
    reference  three servers with 1, 1 and 2 devices and 1.32 x the model of memory
    counts     the same servers where only counts are known
    memory     the same servers with less and more memory
    servers    4, 8 and 16 servers
    churn      experts that move when a placement is made anew
    speed      times to solve

Every server has a workload of its own: topics of the trace. A policy sees the first half of each
topic's tokens (counts are normalised, so every server weighs equally), and what it made is measured
on the second half. Counts alone have no halves: there it is measured on what it was made from.

Columns (means over servers; `dance_jax.placement.metrics`):
    remote      share of expert calls that leave the server
    any miss    share of (token, layer) with any such call: where servers step on their own, a step
                waits for others there
    transfers   remote servers that a token visits per layer
    busiest     hidden states into or out of the busiest server of a layer, per token of a server:
                worst server and direction of each layer, mean over layers
    load        largest share of a layer's expert calls on one device, mean over layers
    device      the same of all layers' calls together
    layer time  predicted time of a layer where servers step on their own, per row of a step, in
                hidden states through a link of equal servers (`CallCost.reference`)
    local       share of the expert calls that the policy saw which are served at home
    bound       no placement in the same slots has more of them at home; where the policy knows
    ms          time to solve, of a second run: compiled
    moved       experts that servers must load which they did not hold before
Under a figure, dim: the one published with the trace and the difference to it. There tokens visit
the lowest number of equal servers, here the next in a ring: the difference is under the former.

Modules: `traces` reads, `setups` says who serves what in which memory, `figures`, `churn` and
`speed` measure, `published` has the figures to compare with, `targets` judges, `tables` and `plots`
show.
"""
