"""Studies: trials of one run that differ in some settings, trained together where they can be, and compared fairly.

definition, points      the study's YAML: its base run, and the points that its trials try
store                   what is known of trials, in SQLite, so that several processes join one study
grouping, packing       which trials may share a pass of the base, and how many fit into memory
running, outcome        a joint run of trials, and what its run folder says of each
samplers/               who proposes points: Optuna, NOMAD, chance
study                   the loop: propose, pack, run, record, report
report/                 ranking, figures, and the three forms of the report
"""
