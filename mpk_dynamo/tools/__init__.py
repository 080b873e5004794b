"""The command line: `python -m mpk_dynamo explain|bench|options`."""
