"""Lose processes, hosts and links of a service under load; `benchmarks/chaos.py` runs it.

Modules: `load` keeps requests in flight and compares their answers; `beds` finds and reaches the
processes of a service, on loopback and on a testbed of hosts in network namespaces; `kinds` has the
faults; `schedule` makes one after another and measures what each cost; `report` prints it.
"""
