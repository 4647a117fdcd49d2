"""The evaluation of arXiv:2508.12851 on servers that run: its policies and ours, one after another.

One cluster is started on a testbed; placements are swapped in it (`POST /placement/rebalance`), and
links get one rate after another. A cell is a workload, a rate, a policy and a seed: each server's
users ask for a task of their own, as a Poisson process; placements are fitted to other prompts of
the same tasks. Words:

- latency: of whole answers, from the moment a request was due.
- remote, transfers: share of expert calls served elsewhere, hidden states sent per token and layer;
  both as the engines counted them, means of the servers.
- busiest, load: hidden states through the busiest server and direction of a layer, per token of a
  server; share of a layer's calls on the busiest device. Predicted on tokens that the placement was
  not fitted to.
- bytes: sent through each host's interface. Bound: transfers x the bytes of a hidden state, there
  and back.
- computing, exchanging, waiting: a step's seconds in the trunk and in experts; in moving rows; in
  waiting for other servers' first bytes, who may compute or send. Mean of the servers.
- utilisation: share of the run's seconds in which the mean server was in a step.
"""
