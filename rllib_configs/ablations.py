"""What each part is worth: the shipped recipe with one thing changed, at a fifth of its budget."""

from dataclasses import replace

from rllib_configs.splitwise import splitwise
from splitray.rl.training.recipe import Recipe
from splitray.rl.world.reward import Weights

_SHARE = 5


def fifth(seed: int = 0) -> Recipe:
    """Nothing changed: what the others are compared with. Variants with other actions learn by PPO alone."""
    whole = splitwise(seed)
    return replace(
        whole, name="fifth", iterations=whole.iterations // _SHARE, foresight_steps=whole.foresight_steps // _SHARE
    )


def no_foresight(seed: int = 0) -> Recipe:
    """PPO alone after cloning, for as many slots as the branches would have taken."""
    recipe = fifth(seed)
    return replace(recipe, name="no_foresight", foresight_steps=0, iterations=3 * recipe.iterations)


def selfish(seed: int = 0) -> Recipe:
    """PPO alone, each edge for itself: the waiting that it causes to others is not charged."""
    return replace(no_foresight(seed), name="selfish", weights=Weights(congestion=0.0))


def dp_modes(seed: int = 0) -> Recipe:
    """The agents may also fix modes and shares, the program decides the rest."""
    return replace(no_foresight(seed), name="dp_modes", variant="dp_modes")


def no_dp(seed: int = 0) -> Recipe:
    """Both agents decide everything, heads and columns by count."""
    return replace(no_foresight(seed), name="no_dp", variant="no_dp")


def bits(seed: int = 0) -> Recipe:
    """As no_dp, a bit for each eighth of the heads (docs/equations.md E2.8)."""
    return replace(no_dp(seed), name="bits", bits=True)


def no_warm_start(seed: int = 0) -> Recipe:
    """Without cloning the exact program first."""
    return replace(fifth(seed), name="no_warm_start", clone_steps=0)


def no_history(seed: int = 0) -> Recipe:
    """Without the history: only the present slot is seen."""
    return replace(fifth(seed), name="no_history", leave_out=("history",))


def no_current_placement(seed: int = 0) -> Recipe:
    """Without the placement that is active: what a move costs is then no function of the state."""
    return replace(fifth(seed), name="no_current_placement", leave_out=("placement",))


def no_lyapunov(seed: int = 0) -> Recipe:
    """Waiting, energy and moves only; queues are not charged beside the waiting that they mean."""
    return replace(fifth(seed), name="no_lyapunov", weights=Weights(queue=0.0))


def single_critic(seed: int = 0) -> Recipe:
    """One value of the whole reward."""
    return replace(fifth(seed), name="single_critic", dual=False)
