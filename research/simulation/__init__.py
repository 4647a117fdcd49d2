"""The paper's cluster and its sweep, simulated: research/simulate.py.

Sections:
    parts     the paper's three servers at 500 Mbps, every policy, with and without lock step, with
              a message per visited server or per remote expert call: what each part gains
    recorded  the same servers, with measured routes (gpt-oss-20b) and recorded arrivals (Azure)
    sweep     4 to 256 devices, 100 to 1000 Mbps, a request every 8, 10 or 15 s on each server,
              served as by the paper's system (a message per remote expert call) and as by this
              engine (a message per visited server); with --lock-step also in lock step, up to 32
              devices

The model is DeepSeek-V2-Lite in bfloat16. Assumptions beside those of research.simulator:

- Devices are A100-like by arithmetic, not by measurement: an expert's weights are read once a step
  (17.3 MB at about 1.2 TB/s), a call and the trunk's tokens compute at about 100 Tflop/s, and a
  step takes 3.5 ms besides (reading the trunk's weights, scheduling, launching). No real software
  is as fast, the paper's included, so compare ratios, not seconds.
- A message takes 0.3 ms from server to server besides its bytes.
- Every device holds 0.33 of the model's experts, so 4 devices hold 1.32 models.
- Each server has a task of its own: in each layer the logits of experts fall with the logarithm of
  their rank (Zipf, exponent 1), in an order of the task's own, and a token chooses the k best after
  Gumbel noise. So the experts of one token are drawn independently, unlike those of real models.
  Policies see other tokens than those that are served.
- Lengths are lognormal, with a median of 32 tokens for prompts and 20 for answers: longer ones
  overload links of 100 Mbps. A run has 300 requests, or five for each server, whichever is more.
  Azure's requests keep their lengths and are slowed down to one a minute on a server.
- Servers have 1, 1 and 2 devices in turn. A cluster in lock step has at most 32 devices in 24
  servers: the sweep's larger ones would be several of those.
"""
