"""What generates: engines, rendering, the policy, and the server over it."""
