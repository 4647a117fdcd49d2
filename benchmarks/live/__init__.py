"""Measure a running service under load; shared by research/migrate.py and research/paper.py.

Modules: `places` starts the servers, as processes here or on the hosts of a testbed; `tasks` makes
each server's requests and their arrival times; `watch` sends the requests, samples the servers'
metrics meanwhile, and moves experts.
"""
