"""What a policy acts in: weather, queues, what it sees, what it may do and what that costs. Knows no RLlib."""
