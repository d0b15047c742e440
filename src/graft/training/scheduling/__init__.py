"""Decide which jobs of a run are in memory, which share the next step, and which end early. Decisions are made between steps.

`memory` fits a model of peak memory to the steps seen; `admission` chooses by priority, arrival and that model, and then the window of
jobs that wastes the least padding; `halving` ends the jobs that do worst. Nothing here touches a model or a file of the run.
"""
