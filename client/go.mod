module github.com/topgun-sync/topgun/client

go 1.26.0

require (
	github.com/coder/websocket v1.8.15
	github.com/tinylib/msgp v1.6.5
	github.com/topgun-sync/topgun/core v0.0.0
	go.uber.org/goleak v1.3.0
)

require github.com/philhofer/fwd v1.2.0 // indirect

replace (
	github.com/topgun-sync/topgun/core => ../core
	github.com/topgun-sync/topgun/gen => ../gen
)
