"""Solution of exercise 10.

At step 14 the share of right answers falls from 0.89 to 0.60. Most responses to one problem read a sign
wrong: they add where the problem multiplies, and calculate well from there. All eight are wrong, so
that their outcome advantages are 0: from this problem the outcome teaches nothing. What is left is the
flow reward. Four fifths of it fall on "=", in right steps as in wrong ones; the sign, at which the
responses go wrong, is never penalised. The reward was no help: it is blind to a step that is well
formed and does something else than the problem asks. The step after, the share is back at 0.80: other
problems came, and a fall of one step says little of the policy.
"""

STEP = 14
PROBLEM = "7 +9 +4 -3 -3 -8 +5 *2 +7>"
WRITTEN = "1+2=3"
MISTAKE = "operation"
OUTCOME = 0.0
SHARE = 0.82
VERDICT = "never at the wrong token"
