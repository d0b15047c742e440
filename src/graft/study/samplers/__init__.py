"""Who proposes the points of a search. Each sampler is a function of all that was told so far, so that a search that was killed goes on
where it was, and several processes ask for points of one search.
"""
