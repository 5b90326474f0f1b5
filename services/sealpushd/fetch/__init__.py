"""The mailbox: accepted messages, their deliveries and states, and how devices fetch and acknowledge them."""
