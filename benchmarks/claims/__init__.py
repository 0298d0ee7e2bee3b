"""What the literature claims, and what became of each claim here: the ledger of the course.

    python -m benchmarks.claims      # writes data/claims.json; python -m benchmarks.pages the pages

A claim is a sentence with a number in it, and it is never believed for its author's sake. Each one
stands above the function that tests it, in the module of its topic. The function computes from the
library or reads a stored result, and answers with our value, a verdict, and one sentence that says
why. Of our own values none is typed in: what stands as a literal number is the claim's, or a shape.
So when a result is measured anew its row changes, and a test notices that the file has not.

There are four verdicts. *Reproduced*: our value agrees. *In part*: some of it agrees, or all of it
under a condition that the claim leaves out, or only on a model far smaller than the claim's.
*Contradicted*: our value disagrees, which a small model is enough for. *Not here*: this course has
not what it would take, or has not measured it yet; the sentence says which.
"""

# The order of these is the order of the table, and speed reads what memory plans.
from benchmarks.claims import memory, format, parameters, quality, speed  # noqa: F401, I001
