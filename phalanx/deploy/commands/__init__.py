"""The commands of `phalanx`, one file each; the file's name is the command's."""
