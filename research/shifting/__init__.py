"""Measure how experts follow the workload, on a service whose users change their task.

Sections:

- shift: every server's users send requests of one task, then of another. The same requests go to
  servers that keep their placement and to servers that migrate; those of the second task also go
  to servers that were placed for it. Latency is of complete answers, from the moment a request was
  due. The remote share of a period is that of the expert calls counted in this period.
- accumulate: the same with statistics that never fade, as in arXiv:2508.12851, to see how often the
  servers then migrate.
- pause: experts move while streams decode steadily. Steps and gaps between tokens during the
  migration are compared with those in the seconds before.
- stable: the first task for ten intervals, during which nothing should move.

The length of steps is measured by the engines (`dance_jax:longest_step_seconds`, over ten seconds);
all other times are measured by the client. With a link rate, the servers run on the hosts of a
testbed (benchmarks/namespaces); otherwise they are processes on this machine with unlimited links.
"""
