"""The report of a study: what was tried, which setting is best and how sure that is, in HTML, Markdown and JSON.

entries, ranking     what is compared; order, intervals, tests against the best
data                 everything that the report says, as JSON values
figures, drawing     the charts, as SVG
page, markdown       the two forms for readers
writing              all three files
"""
