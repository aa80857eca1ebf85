"""The papers' own cost forms, as printed or as coded beside corrected ones: for comparison, never executed.

One file a paper: `kafetzis` (arXiv 2505.02533), of which the planner `scored` takes blocks and transfers; `chen` (arXiv
2406.02616), `splitwise_drl` (arXiv 2512.23310) and `kafetzis.inference_s`, which only tests read: they hold our cost
model to the papers' formulas. Each erratum is a switch of its own. Marks in the docstrings: STATED, read in the paper;
CODE, read in its first author's released code; 2ND, a third party's summary; INFERRED, our completion.
"""
