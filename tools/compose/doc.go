// Package compose holds the test of docker-compose.yml. It has no other code.
package compose
