-- Devices that their node uses no more, such as one that a process holds which does not die.

ALTER TABLE devices
    -- Why the device is not given to anybody; empty for one that may be.
    ADD COLUMN set_aside_reason text NOT NULL DEFAULT '';
