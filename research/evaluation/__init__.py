"""The evaluation of arXiv:2508.12851 on running servers: its policies and ours, one after another.

One cluster is started on a testbed. Placements are swapped in it (`POST /placement/rebalance`), and
its links get one rate after another. A cell is a workload, a rate, a policy and a seed. The users
of each server ask for a task of their own, as a Poisson process; placements are fitted to other
prompts of the same tasks. Terms:

- latency: seconds from the moment when a request was due to the end of its whole answer.
- remote, any-miss, transfers: share of expert calls that other servers compute; share of (token,
  layer) with any such call; hidden states sent per token and layer. The engines counted them; means
  over servers.
- busiest, load: hidden states through the busiest server and direction of a layer, per token of a
  server; share of a layer's calls on the busiest device. Predicted on tokens that the placement was
  not fitted to.
- MB of each link: sent through each host's interface, in the order of the servers.
- bound: transfers x the bytes of a hidden state, there and back, over all hosts.
- computing, waiting: seconds of steps in which a server computes, and in which it waits for sums of
  other servers; means over servers.
- longer: seconds of steps over their seconds of computing: how many times as long steps take as if
  nothing were sent. The paper's layers took up to 8.3 times as long with all calls remote. The
  policy with the most remote calls is compared with that, although some of its calls are local, and
  the rate at which it comes nearest is named (`weight`). Latency targets are judged at that rate.
- utilisation: share of the run in which the mean server was in a step.
- simulated: the mean latency according to the simulator, with speeds that were measured in the runs
  (`predict`) and the testbed's quotas of cores (`quota`). Only of servers that step on their own.
  `--save-runs F` keeps what the simulator needs, `--runs F` simulates it again without measuring.

`--hosts N` uses N hosts of one device each instead of the paper's three, and gives the tasks to
their users in turn.

`--shape mixtral` evaluates a model of Mixtral's shape (8 experts per layer, 2 per token) with
random weights. Servers have memory for 1.11 x the experts, 1.125 x in whole slots of all devices,
plus the spare slots by which placements are swapped. Random routers follow the token and know no
tasks: in varied text all experts are used about equally often, and servers differ only as far as
the tokens of their prompts differ, most in tasks that repeat a few tokens. So locality gains much
less than in a trained model, and the gain says nothing about Mixtral itself. What this shows is the
effect of few large experts and scarce memory. All answers have the full length, because such a
model never emits an end.
"""
