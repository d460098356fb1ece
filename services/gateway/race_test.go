//go:build race

package gateway

// raceDetector: memory is not what it is in production.
const raceDetector = true
