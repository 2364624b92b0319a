-- The node that claimed the folder: no other one finishes it. Claims from before are taken anew when their time is over.
ALTER TABLE job_folders ADD COLUMN claimed_by text;
