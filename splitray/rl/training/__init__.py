"""RLlib's half: the environment's two turns, networks, losses, rollouts, and the policy that comes out."""
