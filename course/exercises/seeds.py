"""Exercise 11, 30 minutes: what one run says, and what eight say.

Does the published flow reward help in the world toy-sparse? Each arm of a stored study ran on eight
seeds. With the same seed, two arms see the same problems in the same order, so they are compared in
pairs. A figure is the share of right answers in the last ten of 100 steps.

1. Choose a SEED from 0 to 7, before you have seen any figure. Run the check: it shows that seed's two
   runs. Write the CLAIM that you would make of them: "helps", "harms", or "no difference" where they
   differ by less than 0.1.
2. Write paired_interval: mean and 95 % interval of the paired differences d_1 … d_n, by

       mean -+ q * std/sqrt(n)         std divides by n - 1; q is 2.365 for n = 8, the 0.975 quantile
                                       of Student's t with n - 1 degrees of freedom (scipy.stats.t.ppf)

3. Run the check again: it shows your interval over all eight seeds. Write the VERDICT, "helps", "harms"
   or "cannot tell": what may be said if the interval holds 0?

Bar: the claim is that of your seed, the interval is right, and the verdict follows from the interval.
"""

SEED: int | None = None  # 0 to 7
CLAIM: str | None = None  # of this seed alone: "helps", "harms" or "no difference"
VERDICT: str | None = None  # of eight seeds: "helps", "harms" or "cannot tell"


def paired_interval(differences: list[float]) -> tuple[float, float, float]:
    """Return the mean of differences, one a seed, and the bounds of its 95 % interval."""
    raise NotImplementedError
