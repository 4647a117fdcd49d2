"""A service that runs while users ask it for tasks: what migrate.py and paper.py both measure.

Modules: `places` are where its servers run, processes here or hosts of a testbed; `tasks` what
each server's users ask and when; `watch` asks it, notes what the servers tell meanwhile, and moves
experts.
"""
