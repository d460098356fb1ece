package cli

import "github.com/topgun-sync/topgun/services/internal/commitlog"

// Log are the flags of the programs that make the log if there is none.
type Log struct {
	Shards      int   `default:"16" env:"TOPGUN_SHARDS" help:"Number of shards of the cluster. Fixed when the log is made; later values are ignored."`
	LogMaxBytes int64 `name:"log-max-bytes" default:"8589934592" env:"TOPGUN_LOG_MAX_BYTES" help:"Size of the log at which writes are refused until the store has caught up. Fixed when the log is made."`
	LogReplicas int   `name:"log-replicas" default:"1" env:"TOPGUN_LOG_REPLICAS" help:"On how many NATS servers the log is kept, at least."`
}

// Config is the log that the flags ask for.
func (l Log) Config() commitlog.Config {
	return commitlog.Config{Stream: commitlog.StreamName, MaxBytes: l.LogMaxBytes, Replicas: l.LogReplicas, Shards: l.Shards}
}

// Shards are the flags of the programs that own shards.
type Shards struct {
	AcceptLogLoss bool `name:"accept-log-loss" env:"TOPGUN_ACCEPT_LOG_LOSS" help:"Start although the store was filled from another log, which is gone. What that log held and the store does not is lost."`
}
