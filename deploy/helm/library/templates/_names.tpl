{{/* The name of what belongs together: services find each other by it. */}}
{{- define "topgun.cluster" -}}
{{- .Values.global.cluster | default .Release.Name | trunc 51 | trimSuffix "-" -}}
{{- end }}

{{/* Name of everything that a chart makes. */}}
{{- define "topgun.name" -}}
{{ include "topgun.cluster" . }}-{{ .Chart.Name }}
{{- end }}

{{/* Labels that select the pods of this chart. */}}
{{- define "topgun.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/part-of: {{ include "topgun.cluster" . }}
{{- end }}

{{- define "topgun.labels" -}}
{{ include "topgun.selector" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "topgun.metadata" -}}
name: {{ include "topgun.name" . }}
namespace: {{ .Release.Namespace }}
labels: {{- include "topgun.labels" . | nindent 2 }}
{{- end }}

{{/* Peer of a NetworkPolicy: the pods of one of our services. Takes root, service. */}}
{{- define "topgun.peer" -}}
- podSelector:
    matchLabels:
      app.kubernetes.io/name: {{ .service }}
      app.kubernetes.io/part-of: {{ include "topgun.cluster" .root }}
{{- end }}
