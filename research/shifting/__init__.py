"""Experts that follow the workload, measured on a service whose users change their minds.

Sections:

- shift: every server's users ask for one task, and half-way for another one. The same requests
  are sent to servers that stay as they are, to servers that migrate, and, of the second half, to
  servers that were placed for it. Latency is of whole answers, from the moment a request was due.
  The remote share of a time is that of the expert calls counted in it.
- accumulate: the same with statistics that never fade, as in arXiv:2508.12851: how often that
  migrates.
- pause: streams decode steadily, and experts are moved: what it does to steps, and to the gaps
  between tokens, against the seconds before.
- stable: the first task for ten intervals, in which nothing should move.

A step's length is the engines' own (`dance_jax:longest_step_seconds`, of ten seconds); times are
of the client's clock. With a link rate the servers are hosts of a testbed (benchmarks/namespaces),
else processes of this machine on links that nothing slows down.
"""
