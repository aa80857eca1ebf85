"""`splitray evaluate`: suites that compare planners on equal terms."""
