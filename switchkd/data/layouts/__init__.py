"""Layouts of labels on the disk, a file each: what they hold becomes `switchkd.data.DefectImage`."""
