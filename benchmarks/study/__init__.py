"""The study of chapter 8: ways to fine-tune, each at its best learning rate, fairly compared.

    python -m benchmarks.study      # hours on two cores; interrupt it, run it again, it goes on

It runs on the base in `data/next-base/`. `make experiments` still runs `three_ways.py`, and
notebook 8 shows what that has stored; it goes when this study has taken its place.

Every run sees 240 steps of 8 rows of the embedded tasks; runs of one seed see the same rows in the
same order. The learning rate warms up over 10 steps and falls along a cosine.

tuning   for each way, and for few rows too, learning rates a factor of two apart until the best
         lies between two others; two seeds; judged by exact match on the validation rows
pilot    full, LoRA and QLoRA at those rates, on other seeds, still on the validation rows
plan     from the pilots, the number of seeds: `study_plan.json`, committed before it is followed
verdict  each way at its own rate, as many seeds as the plan says, measured on the test rows
bits     QLoRA over a base in 3 and in 2 bits: does the adapter mend what rounding broke?
rows     100 different rows in place of 3,000, at the same number of steps, at rates of their own
unseen   the same tasks with words that the base has never seen, added to its tokenizer
cost     seconds per step (ways take turns, so that all see the same machine) and peak memory

Each run is also asked for its perplexity on held-out *pretraining* text (what was forgotten?). The
results are stored, run by run, as data/results/study.json.
"""
