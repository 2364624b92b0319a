"""Who gets which devices: the policy, and the allocations that a device's one owner holds.

It knows what a job needs, and nothing of what runs on the devices.
"""
