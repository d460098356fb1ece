package allinone

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// lock takes the file for this process, so that no second one opens the same data.
// The kernel gives it back when the process ends, however it ends.
func lock(path string) (unlock func() error, err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock of the data folder: %w", err)
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = file.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("another process is using the data folder (%s is locked): stop it, or choose another folder with --data", path)
		}
		return nil, fmt.Errorf("lock the data folder: %w", err)
	}
	return file.Close, nil
}
