"""Which server holds which expert: statistics, policies, measures, and the shared tie rule."""
