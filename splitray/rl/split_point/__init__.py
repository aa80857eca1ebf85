"""Where to cut as a channel changes (Chen et al., arXiv 2406.02616): the decision process, policies and learners."""
