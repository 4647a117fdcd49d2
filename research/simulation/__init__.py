"""The paper's cluster and sweep, simulated: research/simulate.py.

Sections:
    parts     the paper's three servers at 500 Mbps, every policy, in lock step or not, with a
              message per visited server or per remote expert call: what each part brings
    recorded  the same servers, with measured routes (gpt-oss-20b) and recorded arrivals (Azure)
    sweep     4 to 256 devices, 100 to 1000 Mbps, requests every 8, 10, 15 s on each server, as the
              paper's system serves (a message per remote expert call) and as this engine does (one
              per visited server); with --lock-step also in lock step, to 32 devices

The model is DeepSeek-V2-Lite in bfloat16. Assumptions beside those of research.simulator:

- Devices are A100-like by arithmetic, not by measurement: an expert's weights are read once a step
  (17.3 MB at about 1.2 TB/s), a call and the trunk's tokens compute at about 100 Tflop/s, and a
  step takes 3.5 ms besides (the trunk's weights are read, it is scheduled and launched). No
  software is as fast; that of the paper is not, so compare ratios, not seconds.
- A message takes 0.3 ms from server to server besides its bytes.
- Every device holds 0.33 of the model's experts, so 4 devices hold 1.32 models.
- Each server has a task of its own: in each layer its experts' logits fall with the logarithm of
  their rank (Zipf, exponent 1) in an order of its own, and a token takes the k best after Gumbel
  noise. Experts of one token are then drawn independently, which those of real models are not.
  Policies see other tokens than those that are served.
- Prompts are lognormal with a median of 32 tokens, answers with one of 20: longer ones overload
  links of 100 Mbps. A run has 300 requests, or five of each server, whichever is more. Azure's
  requests keep their lengths and are slowed to one a minute on a server.
- Servers have 1, 1 and 2 devices in turn. A cluster in lock step has at most 32 devices in 24
  servers: the sweep's larger ones would be several of those.
"""
