"""Kills a run at random moments, starts it again by the documented commands, and compares it with an undisturbed one.

command.py    the program: both runs, the comparison, the line of JSON
attack.py     makes each kill at its moment, waits for the next finished step
schedule.py   which kill comes when: a function of the seed
targets.py    how each kind of kill is made
disk.py       the small disk that the run folder lies on
terminal.py   the person at the terminal: start.sh, stop.sh, ray_jobs.submit, and nothing else
timeline.py   what the run's log says happened when
compare.py    what of two runs has to be equal
report.py     the figures
"""
