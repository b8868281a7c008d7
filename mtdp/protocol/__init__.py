"""The paper's protocol: leave one task out, pre-train on the rest, transfer to it, and choose by average rank.

Every unit of work is a cell with a result file of its own, so a run that was killed goes on with the next missing one.
"""
