"""What every test shares: one thread, no window, and a tiny notebook that keeps the whole contract."""

import os

# Before any framework is imported; `make test` runs two processes side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

TINY = """\
# %% [markdown]
# # 01 · A tiny notebook
#
# After this notebook you can
#
# - add two numbers
# - compare the sum with a prediction
#
# | | |
# |:--|:--|
# | What you need | nothing |
# | Your time | 5 minutes |
# | Machine time | 2 seconds |
# | Framework | NumPy |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")
first = 2

# %%
import numpy as np

from nlutils.course import check, settings

settings(profile)
x = np.array([first, 3])
assert x.shape == (2,)

# %% [markdown] tags=["predict"]
# What is the sum of 2 and 3?

# %%
print("the sum is", x.sum())

# %% [markdown] tags=["explain"]
# It is 5, by
#
# $$ s = \\sum_j x_j $$

# %%
s = sum(x_j for x_j in x)
assert s == x.sum()

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · The product (easy, 2 minutes)
# Multiply. **Expect**: 6.
# <details><summary>Hint 1: a nudge</summary> Not the sum. </details>
# <details><summary>Hint 2: the formula</summary> x_0 x_1 </details>
# <details><summary>Hint 3: part of the code</summary> x[0] * … </details>

# %% tags=["stub"]
def product(x):
    #: solution
    return x[0] * x[1]
    #: stub
    return None  # your code here
    #: end

# %% tags=["check"]
check("Exercise 1", lambda: product(x), 6, mistakes={"you added": 5})

# %% [markdown]
# ## What you learned
# - Sums are numbers.
# - Products are, too.
#
# ## Further reading
# - G. Peano: Arithmetices principia. Turin, 1889.
"""


def pytest_collection_modifyitems(items):
    """Every notebook's solutions take ten minutes: they start first, so that no process waits for them."""
    items.sort(key=lambda item: item.path.name != "test_solutions.py")


@pytest.fixture
def float64():
    """Keras layers made in the test, and losses, compute in float64."""
    import keras  # here: the test has chosen its backend

    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


@pytest.fixture
def tiny(tmp_path):
    """Makes a folder of notebooks with sources: `tiny()`; changed: `tiny(("the sum is", "the total is"))`."""

    def make(*changes, stem="01_tiny"):
        folder = tmp_path / "notebooks"
        (folder / "src").mkdir(parents=True, exist_ok=True)
        text = TINY
        for old, new in changes:
            assert old in text, f"the tiny notebook holds no {old!r}"
            text = text.replace(old, new)
        (folder / "src" / f"{stem}.py").write_text(text, encoding="utf-8")
        return folder

    return make
