package fanout

import "errors"

var (
	errNotRunning     = errors.New("the service is not running")
	errTooManyStreams = errors.New("too many streams are open")
	errTooManyMaps    = errors.New("the stream watches too many maps")
	errNoStream       = errors.New("there is no such stream; subscribe first")
	errSlow           = errors.New("the stream was read too slowly; subscribe again")
	errBus            = errors.New("the bus is not connected")
)
