"""The evaluation of arXiv:2508.12851 on servers that run: its policies and ours, one after another.

One cluster is started on a testbed; placements are swapped in it (`POST /placement/rebalance`), and
links get one rate after another. A cell is a workload, a rate, a policy and a seed: each server's
users ask for a task of their own, as a Poisson process; placements are fitted to other prompts of
the same tasks. Words:

- latency: of whole answers, from the moment a request was due.
- remote, any-miss, transfers: share of expert calls served elsewhere, of tokens of each layer with
  any such call, hidden states sent per token and layer; all as the engines counted them, means of
  the servers.
- busiest, load: hidden states through the busiest server and direction of a layer, per token of a
  server; share of a layer's calls on the busiest device. Predicted on tokens that the placement was
  not fitted to.
- MB of each link: sent through each host's interface, in the order of the servers. Bound: transfers
  x the bytes of a hidden state, there and back; over all hosts.
- computing, waiting: a step's seconds in the trunk and in experts; in waiting for the sums of other
  servers. Mean of the servers.
- longer: seconds of steps over those of computing, their own if nothing were sent. The paper's
  layers took up to 8.3 times as long with all calls remote. Here it is the policy with the most
  remote calls that is compared with it, though some of its calls are local, and the rate is named
  at which it comes nearest (`weight`). Targets of latency are of that rate.
- utilisation: share of the run's seconds in which the mean server was in a step.
- simulated: what the simulator makes of the mean latency, with speeds that were measured in the
  runs (`predict`) and with what the testbed's quotas of cores do to them (`quota`); of servers that
  step on their own. `--save-runs F` keeps what that takes, `--runs F` simulates it again and
  measures nothing.

`--hosts N` takes N hosts of one device each in place of the paper's three, and gives their users
the tasks in turn.

`--shape mixtral` evaluates a model like Mixtral (8 experts in each layer, 2 of them for a token)
with random weights, at 1.11 x the experts' memory, in whole slots of all devices 1.125 x,
not counting the spare slots by which placements are swapped.
Its routers go by the token and know no tasks: in varied text all experts are used nearly equally
often, and servers differ only as far as the tokens of their prompts do; most in tasks that repeat a
few of them. So locality can win much less than in a model that was trained, and what it wins says
nothing of Mixtral itself. What this shows is what few large experts and scarce memory do. Answers
are as long as they are asked for: nothing that such a model says is an end.
"""
