"""`python -m mpk_dynamo mutate`: are broken programs refused? Real ones, broken one way at a time, go to the verifier.

subject: programs of real models. breakers: ways to break them. judge: an independent oracle for what the verifier lets
pass. command: the run and its table.
"""
